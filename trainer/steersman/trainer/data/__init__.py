"""Human data: rows read with file and line, made into demonstrations, comparisons and prompts, then into batches."""
