"""Two models over a whole data set: readers, metrics that merge in any order, and engines that run them."""
