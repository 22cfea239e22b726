-- submit: push messages to one list of a queue, with their claim checks, all or nothing.
-- KEYS  1 the list to push to   2-5 the queue's lists of every priority   6 sub:queues
-- ARGV  1 queue   2 limit of queued messages (0: none)   3 "1" to check the memory   4 channel to wake lanes
--       5 lifetime of claim checks in s   6 number of claim checks, then each as key, bytes; then the messages
-- Returns {"ok", length} or, with nothing written, {"full", length} or {"memory", used, maximum}.
local length = 0
for i = 2, 5 do
  length = length + redis.call('LLEN', KEYS[i])
end
local blobs = tonumber(ARGV[6])
local first = 7 + 2 * blobs
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
-- SADD comes first: out of memory, it is refused before anything is written.
redis.call('SADD', KEYS[6], ARGV[1])
for i = 7, first - 1, 2 do
  redis.call('SET', ARGV[i], ARGV[i + 1], 'EX', ARGV[5])
end
for i = first, #ARGV, 1000 do -- unpack takes at most 7,999 values
  redis.call('LPUSH', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
if length == 0 then
  redis.call('PUBLISH', ARGV[4], ARGV[1])
end
return {'ok', length + count}
