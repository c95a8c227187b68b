"""`make bench`: lymphfeat beside what one would write or take instead, and beside the limit."""
