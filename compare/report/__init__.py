"""Self-contained HTML: the interactive plot and the report page. Nothing is fetched, nothing that a file says runs."""
