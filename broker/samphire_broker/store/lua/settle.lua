-- settle: end claimed tasks; acknowledgement, result and event in one step.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5.. for each task: field, task id, state, result (JSON), stream ("" for none), claim check ("" for none)
-- Returns for each task 1, or 0 where the claim was lost: then nothing of it is written.
-- HDEL, which frees memory, is the first write, so the whole also goes through when memory is full.
local usable = {['']=false}
for i = 9, #ARGV, 6 do
  local stream = ARGV[i]
  if usable[stream] == nil then
    local kind = redis.call('TYPE', stream).ok
    usable[stream] = kind == 'stream' or kind == 'none'
  end
end
local reply = {}
for i = 5, #ARGV, 6 do
  local field, id, stream = ARGV[i], ARGV[i + 1], ARGV[i + 4]
  local ours = redis.call('HDEL', KEYS[1], field)
  if ours == 1 then
    local key = ARGV[1] .. id
    redis.call('HDEL', KEYS[2], field)
    redis.call('SET', key, ARGV[i + 3], 'EX', ARGV[2])
    redis.call('PUBLISH', key, ARGV[i + 3])
    if usable[stream] then
      redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', 'id', id, 'state', ARGV[i + 2])
    end
    for blob in string.gmatch(ARGV[i + 5], '%S+') do
      redis.call('UNLINK', blob)
    end
  end
  reply[#reply + 1] = ours
end
for stream, ok in pairs(usable) do
  if ok then
    redis.call('EXPIRE', stream, ARGV[4])
  end
end
return reply
