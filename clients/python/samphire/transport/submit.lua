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
if redis.call('EXISTS', KEYS[7]) == 1 then
  return {'ok', 0}
end
if KEYS[8] then
  local known = redis.call('GET', KEYS[8])
  if known then
    local id, digest = string.match(known, '^(%S+) (%S+)$')
    return {digest == ARGV[9] and 'same' or 'conflict', id}
  end
end
local schema = redis.pcall('GET', ARGV[11]) -- a producer may lack the right to look
if type(schema) == 'string' and schema ~= ARGV[10] then
  return {'schema', schema}
end
local length = 0
for i = 2, 5 do
  length = length + redis.call('LLEN', KEYS[i])
end
local blobs = tonumber(ARGV[12])
local first = 13 + 2 * blobs
local count = #ARGV - first + 1
local limit = tonumber(ARGV[2])
if limit > 0 and length + count > limit then
  return {'full', length}
end
if ARGV[3] == '1' then
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
local needs = {{'SADD', KEYS[6], ARGV[1]}, {'SETEX', KEYS[7], 1, ''}, {'LPUSH', KEYS[1], ''}}
if KEYS[8] then
  needs[#needs + 1] = {'SETEX', KEYS[8], 1, ''}
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
redis.call('SADD', KEYS[6], ARGV[1])
redis.call('SETEX', KEYS[7], ARGV[6], '1')
if KEYS[8] then
  redis.call('SETEX', KEYS[8], ARGV[7], ARGV[8] .. ' ' .. ARGV[9])
end
for i = 13, first - 1, 2 do
  redis.call('SET', ARGV[i], ARGV[i + 1], 'EX', ARGV[5])
end
for i = first, #ARGV, 1000 do -- unpack takes at most 7,999 values
  redis.call('LPUSH', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
if length == 0 then
  redis.pcall('PUBLISH', ARGV[4], ARGV[1]) -- without the right to it lanes look for themselves
end
return {'ok', length + count}
