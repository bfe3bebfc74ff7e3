"""What an export found out, as data, tables, Markdown and one HTML file."""
