"""Maps against what annotators drew: scores, their report, tables and plots."""
