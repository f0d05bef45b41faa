"""The application whose tokens have leaked: it stands for the user's own."""
