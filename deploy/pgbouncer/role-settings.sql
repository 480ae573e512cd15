-- What the server asks for when it connects, which PgBouncer does not pass on. Run it as the database's owner.
ALTER ROLE pointbook IN DATABASE pointbook SET enable_seqscan = 'off';
ALTER ROLE pointbook IN DATABASE pointbook SET idle_in_transaction_session_timeout = '120s';
ALTER ROLE pointbook IN DATABASE pointbook SET jit = 'off';
ALTER ROLE pointbook IN DATABASE pointbook SET lock_timeout = '5s';
ALTER ROLE pointbook IN DATABASE pointbook SET plan_cache_mode = 'force_generic_plan';
ALTER ROLE pointbook IN DATABASE pointbook SET statement_timeout = '15s';
