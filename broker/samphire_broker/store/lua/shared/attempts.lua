-- attempts: what is kept of a task that was tried before, or of which this is not the first run.
-- The next run of a task whose last one has failed: `settle` finds its number, and the digests of what has failed.
local function open_run(hash, tried, id, run, failed, lifetime_s)
  try('DEL', hash)
  try('HSET', hash, 'run', run)
  if failed ~= '' then
    try('HSET', hash, 'failed', failed)
  end
  try('EXPIRE', hash, lifetime_s)
  try('SADD', tried, id)
  try('EXPIRE', tried, lifetime_s)
end

-- What is kept of an attempt (JSON, "" for nothing), and what it counts as.
local function note_attempt(hash, tried, id, attempt, counts, lifetime_s)
  if attempt ~= '' then
    local history = try('HGET', hash, 'history')
    try('HSET', hash, 'history', type(history) == 'string' and history .. ',' .. attempt or attempt)
  end
  for _, count in ipairs(counts) do
    try('HINCRBY', hash, count, 1)
  end
  try('EXPIRE', hash, lifetime_s)
  try('SADD', tried, id)
  try('EXPIRE', tried, lifetime_s)
end
