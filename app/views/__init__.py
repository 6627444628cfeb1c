"""The pages: widgets, one library call, drawing."""
