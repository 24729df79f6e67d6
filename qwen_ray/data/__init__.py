"""From files of any known format to the exact, resumable stream of tokens that training reads."""
