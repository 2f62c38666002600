"""Grades: the judge, how well judges agree, and levels set by a writer's spread."""
