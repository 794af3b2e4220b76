"""One reader per raw data set, each turning files into the records of `plum_partonomy.records`."""
