"""Other runtimes: writing their files, running them, and what their precision costs."""
