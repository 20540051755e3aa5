"""Source for compilers that take source: a builder of lines, the expressions of programs, and what is kept on disk."""
