"""One file a verb: what it reads, what it makes, and every refusal that can be known beforehand."""
