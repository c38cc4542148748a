"""Compares maps with what annotators drew: scores, and their report, tables and plots."""
