"""Images and text files that messages carry: uploaded, kept in a store, given to models."""
