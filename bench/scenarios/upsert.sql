\set account random(1, :rows)
INSERT INTO bench_upserts (account, balance) VALUES (:account, 20)
ON CONFLICT (account) DO UPDATE SET balance = bench_upserts.balance + excluded.balance;
