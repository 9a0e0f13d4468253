"""Everything that speaks SQL: the tables, how they are created, and one class a dialect."""
