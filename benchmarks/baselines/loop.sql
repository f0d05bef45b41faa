-- What a DBA writes: batches in the order of the key, a commit after each, and new values from the server.
-- psql -v batch=2000 -f loop.sql; begins at the start, since nothing says how far it got.
SET rotate.batch = :batch;
DO $$
DECLARE
    batch bigint := current_setting('rotate.batch')::bigint;
    last_id bigint := 0;
    next_id bigint;
BEGIN
    LOOP
        SELECT max(id) INTO next_id
        FROM (SELECT id FROM tickets_ticket WHERE id > last_id ORDER BY id LIMIT batch) AS part;
        EXIT WHEN next_id IS NULL;
        UPDATE tickets_ticket SET token = gen_random_uuid() WHERE id > last_id AND id <= next_id;
        last_id := next_id;
        COMMIT;
    END LOOP;
END
$$;
