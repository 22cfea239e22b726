-- settle: end started tasks; acknowledgement, result and event in one step.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5.. for each task: field, task id, state, result (JSON), stream ("" for none), claim checks ("" for none)
-- Returns for each task 1, or 0 where the claim was lost: then nothing of it is written.
-- HDEL, which needs no memory, is the first write, so the whole also goes through when memory is full.
local fields, streams = {}, {}
for i = 5, #ARGV, 6 do
  fields[#fields + 1] = ARGV[i]
  streams[ARGV[i + 4]] = {}
end
for stream in pairs(streams) do
  local kind = stream == '' and 'none' or redis.call('TYPE', stream).ok
  if stream == '' or (kind ~= 'stream' and kind ~= 'none') then
    streams[stream] = nil
  end
end
local ids = redis.call('HMGET', KEYS[2], unpack(fields))
redis.call('HDEL', KEYS[1], unpack(fields))
redis.call('HDEL', KEYS[2], unpack(fields))
local reply = {}
for n = 1, #fields do
  local i = 6 * n - 1
  local id, state, events = ARGV[i + 1], ARGV[i + 2], streams[ARGV[i + 4]]
  reply[n] = ids[n] == id and 1 or 0
  if reply[n] == 1 then
    local key = ARGV[1] .. id
    redis.call('SETEX', key, ARGV[2], ARGV[i + 3])
    redis.call('PUBLISH', key, ARGV[i + 3])
    if events then
      events[state] = events[state] and events[state] .. ' ' .. id or id
    end
    for blob in string.gmatch(ARGV[i + 5], '%S+') do
      redis.call('UNLINK', blob)
    end
  end
end
for stream, events in pairs(streams) do
  for state, list in pairs(events) do
    redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', state, list)
    redis.call('EXPIRE', stream, ARGV[4])
  end
end
return reply
