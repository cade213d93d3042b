"""What to paint: prompt files, the data set that draws from them, and the curation of training prompts."""
