"""One reader per raw data set. Each converts files to the records of `plum_partonomy.records`."""
