"""Model cards, data set cards and the files of a repository on the Hub."""
