"""Self-contained HTML: interactive plot and report page. It fetches nothing; no text of a result file runs."""
