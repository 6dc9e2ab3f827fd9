"""What several scripts share, one module per topic; README.md has the list."""
