"""Where any of it runs, and what a run says of itself."""
