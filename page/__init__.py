"""The page of app.py: its requests and jobs, its words, and the editor that runs in the browser."""
