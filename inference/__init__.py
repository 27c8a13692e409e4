"""Archives of tiles become a table of classes and a page."""
