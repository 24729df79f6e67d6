"""What one record must be: its text, language, licence and turns; and when two are the same."""
