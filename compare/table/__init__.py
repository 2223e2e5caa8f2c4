"""Comparisons as tables: all fields of a point, columns for readers, and the output formats.

attribution         The table of ``compare attribute``: parts by their cost
column              `Column`: a column of the tables for readers
columns             The columns of the tables for readers, as text: terminal, Markdown, report
divergence_columns  The columns beside a divergence: its spread, the agreement of the first choices, and the noise
                    floor
domains             The table of ``compare domains``: a column a domain, the worst of each model marked
formats             The table as JSON, CSV and Markdown
pair_columns        The columns that --versus adds to a table: the difference, its interval, its p-value, and the
                    outcome
position_columns    The columns that --by-position adds to a table: the metric at the first and last positions, and
                    the slope
rows                Everything known about a point, at full precision: the records of the JSON and CSV tables
terminal            The table for the terminal, drawn by rich; thousands of rows are plain columns
"""
