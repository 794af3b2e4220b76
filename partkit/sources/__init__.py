"""One module per raw data set, each turning files into the records of `partkit.schema`."""
