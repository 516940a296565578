"""Facts as edit records, and their prompts as tokens. Imports: errors."""
