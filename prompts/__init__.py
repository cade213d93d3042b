"""What to paint: prompt files, and the data set that draws from them."""
