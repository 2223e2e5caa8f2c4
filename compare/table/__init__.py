"""A comparison as a table: what is known of a point, columns for readers, and the formats that show them."""
