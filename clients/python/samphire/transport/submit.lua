-- submit: push messages to one list of a queue, with their claim checks, all or nothing, and once.
-- KEYS  1 the list to push to   2-5 the queue's lists of every priority   6 sub:queues   7 sub:once:<call>
--       8 sub:key:<…>, of a submit that has an idempotency key
-- ARGV  1 queue   2 limit of queued messages (0: none)   3 "1" to check the memory   4 channel to wake lanes
--       5 lifetime of claim checks in s   6 lifetime in s of the mark that this call was carried out
--       7 lifetime of the idempotency key in s   8 task id   9 digest of what is asked for (7-9: "" without a key)
--      10 version of the schema that this client knows   11 key of that of the workers, which a producer only reads
--      12 number of claim checks, then each as key, bytes; then the messages
-- A call that is repeated because its reply was lost finds the mark, and does nothing more.
-- Returns {"ok", length}, {"same", task id} where the key has a task already, or, with nothing written,
-- {"conflict", task id} where that task was asked for something else, {"full", length}, {"memory", used, maximum}, or
-- {"schema", version} where the workers have another one.
local list_key, queues_key, once_key, idempotency_key = KEYS[1], KEYS[6], KEYS[7], KEYS[8]
local queue, queue_max, check_memory, wake_channel, blob_ttl_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local once_ttl_s, idempotency_ttl_s, task_id, asked_digest, own_schema = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local schema_key, blob_count = ARGV[11], ARGV[12]
if redis.call('EXISTS', once_key) == 1 then
  return {'ok', 0}
end
if idempotency_key then
  local known = redis.call('GET', idempotency_key)
  if known then
    local id, digest = string.match(known, '^(%S+) (%S+)$')
    return {digest == asked_digest and 'same' or 'conflict', id}
  end
end
local schema = redis.pcall('GET', schema_key) -- a producer may lack the right to look
if type(schema) == 'string' and schema ~= own_schema then
  return {'schema', schema}
end
local length = 0
for i = 2, 5 do
  length = length + redis.call('LLEN', KEYS[i])
end
local blobs = tonumber(blob_count)
local first = 13 + 2 * blobs
local count = #ARGV - first + 1
local limit = tonumber(queue_max)
if limit > 0 and length + count > limit then
  return {'full', length}
end
if check_memory == '1' then
  local info = redis.pcall('INFO', 'memory')
  if type(info) == 'string' then -- a producer may lack the right to ask
    local used = tonumber(string.match(info, 'used_memory:(%d+)'))
    local maximum = tonumber(string.match(info, 'maxmemory:(%d+)'))
    if maximum > 0 and used > 0.8 * maximum then
      return {'memory', used, maximum}
    end
  end
end
-- A script is not all or nothing: whatever can fail is tried before the first write.
local may = redis.acl_check_cmd or function() -- Redis before version 7 cannot be asked
  return true
end
local needs = {{'SADD', queues_key, queue}, {'SETEX', once_key, 1, ''}, {'LPUSH', list_key, ''}}
if idempotency_key then
  needs[#needs + 1] = {'SETEX', idempotency_key, 1, ''}
end
if blobs > 0 then
  needs[#needs + 1] = {'SET', ARGV[13], ''}
end
for _, command in ipairs(needs) do
  if not may(unpack(command)) then
    return redis.error_reply('NOPERM this user may not run ' .. command[1] .. ' on ' .. command[2])
  end
end
-- SADD comes first: out of memory, or on a key of another type, it is refused before anything is written.
redis.call('SADD', queues_key, queue)
redis.call('SETEX', once_key, once_ttl_s, '1')
if idempotency_key then
  redis.call('SETEX', idempotency_key, idempotency_ttl_s, task_id .. ' ' .. asked_digest)
end
for i = 13, first - 1, 2 do
  redis.call('SET', ARGV[i], ARGV[i + 1], 'EX', blob_ttl_s)
end
for i = first, #ARGV, 1000 do -- unpack takes at most 7,999 values
  redis.call('LPUSH', list_key, unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
if length == 0 then
  redis.pcall('PUBLISH', wake_channel, queue) -- without the right to it lanes look for themselves
end
return {'ok', length + count}
