"""The one sampler: filters on the policy, guidance on the survivors, batches with caches across turns."""
