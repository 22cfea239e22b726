-- fail: end claimed tasks as dead letters, which keep the original bytes.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 dead
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 prefix of letters   6 lifetime of letters in s   7 worker id
--       8 MessagePack: array of [field, letter id, task id ("" where it cannot be read), result (JSON),
--         stream ("" for none), model, reason, error, attempts]
-- Returns for each task 1, or 0 where the claim was lost: then nothing of it is written.
local usable = {['']=false}
local letters = cmsgpack.unpack(ARGV[8])
for n = 1, #letters do
  local stream = letters[n][5]
  if usable[stream] == nil then
    local kind = redis.call('TYPE', stream).ok
    usable[stream] = kind == 'stream' or kind == 'none'
  end
end
redis.call('ZCARD', KEYS[3]) -- fails before the first write if the key is of another type
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local reply = {}
for n = 1, #letters do
  local field, letter, id, meta, stream, model, reason, err, attempts = unpack(letters[n])
  local message = redis.call('HGET', KEYS[1], field)
  local ours = 0
  if message then
    ours = 1
    redis.call('HDEL', KEYS[1], field)
    redis.call('HDEL', KEYS[2], field)
    local key = ARGV[5] .. letter
    local queue = string.match(field, '^%d+:([^\6]*)')
    redis.call('HSET', key, 'message', message, 'queue', queue, 'task_id', id, 'model', model,
      'reason', reason, 'error', err, 'attempts', attempts, 'worker', ARGV[7],
      'died_at', string.format('%.6f', now))
    redis.call('EXPIRE', key, ARGV[6])
    redis.call('ZADD', KEYS[3], now, letter)
    local old = id ~= '' and redis.call('GET', ARGV[1] .. id)
    local state = old and string.match(old, '"status": ?"(%u+)"')
    -- A letter is kept in any case, but the terminal state of a task is written once.
    if id ~= '' and state ~= 'SUCCESS' and state ~= 'FAILURE' and state ~= 'REVOKED' then
      redis.call('SET', ARGV[1] .. id, meta, 'EX', ARGV[2])
      redis.call('PUBLISH', ARGV[1] .. id, meta)
      if usable[stream] then
        redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', 'failed', id)
      end
    end
  end
  reply[n] = ours
end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - tonumber(ARGV[6]))
for stream, ok in pairs(usable) do
  if ok then
    redis.call('EXPIRE', stream, ARGV[4])
  end
end
return reply
