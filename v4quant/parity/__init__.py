"""Does a checkpoint still compute what the original computes: two runs in lockstep, judged by the noise of one."""
