"""What commands are made of: options, help pages, and the work of those that do more than a page of it."""
