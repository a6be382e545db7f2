"""From a call to launches: which rows, in which chunks, through which products; on how many processes."""
