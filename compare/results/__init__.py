"""Result files to records."""
