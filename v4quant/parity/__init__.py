"""Does a checkpoint still compute what the original computes: judged by the reference's own noise."""
