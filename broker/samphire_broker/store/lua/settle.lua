-- settle: end started tasks; acknowledgement, result and event in one step.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 largest result that its event carries, if it is settled alone, so that who waits need not ask for it
--       6 MessagePack: array of [field, task id, state, result (JSON), stream ("" for none), claim checks to delete]
-- Returns for each task 1, or 0 where the claim was lost: then nothing of it is written. Of a task that has ended
-- already the message is dropped and nothing else: a terminal state is written once.
-- HDEL, which needs no memory, is the first write, so the whole also goes through when memory is full.
local tasks = cmsgpack.unpack(ARGV[6])
local fields, metas, streams = {}, {}, {}
for n = 1, #tasks do
  fields[n], metas[n] = tasks[n][1], ARGV[1] .. tasks[n][2]
  streams[tasks[n][5]] = {}
end
for stream in pairs(streams) do
  local kind = stream == '' and 'none' or redis.call('TYPE', stream).ok
  if stream == '' or (kind ~= 'stream' and kind ~= 'none') then
    streams[stream] = nil
  end
end
local old = redis.call('MGET', unpack(metas))
local reply = {}
for n = 1, #fields do
  reply[n] = redis.call('HEXISTS', KEYS[1], fields[n])
end
redis.call('HDEL', KEYS[1], unpack(fields))
redis.call('HDEL', KEYS[2], unpack(fields))
local ended = {SUCCESS = true, FAILURE = true, REVOKED = true}
for n = 1, #tasks do
  local _, id, state, meta, stream, blobs = unpack(tasks[n])
  local before = old[n] and string.match(old[n], '"status": ?"(%u+)"')
  if reply[n] == 1 and not ended[before] and not ended[metas[n]] then
    local key = metas[n]
    ended[key] = true
    redis.call('SETEX', key, ARGV[2], meta)
    redis.call('PUBLISH', key, meta)
    local events = streams[stream]
    if events then
      events[state] = events[state] and events[state] .. ' ' .. id or id
    end
    if #blobs > 0 then
      redis.call('UNLINK', unpack(blobs))
    end
  end
end
for stream, events in pairs(streams) do
  for state, list in pairs(events) do
    if #tasks == 1 and #tasks[1][4] <= tonumber(ARGV[5]) then
      redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', state, list, 'result', tasks[1][4])
    else
      redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', state, list)
    end
    redis.call('EXPIRE', stream, ARGV[4])
  end
end
return reply
