"""The paper's experiments: what each computes, and what it says in the report."""
