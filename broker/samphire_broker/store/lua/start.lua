-- start: mark claimed tasks as running.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started
-- ARGV  1 prefix of result keys   2 prefix of task hashes   3 lifetime of the state in s   4 host name
--       5 process id   6.. field, task id, field, task id, …
-- Returns for each task how many workers were lost with it, or -1 (claim lost: not ours any more), or -2
-- (the task already ended: a terminal state is written once; the message is dropped as a duplicate).
local tail = ',"result":{"hostname":' .. cjson.encode(ARGV[4]) .. ',"pid":' .. ARGV[5] .. '}'
tail = tail .. ',"traceback":null,"children":[],"date_done":null}'
local reply = {}
redis.call('HDEL', KEYS[2], '') -- writes nothing, but as a first write lets the rest through when memory is full
for i = 6, #ARGV, 2 do
  local field, id = ARGV[i], ARGV[i + 1]
  local verdict
  if redis.call('HEXISTS', KEYS[1], field) == 0 then
    verdict = -1
  else
    local key = ARGV[1] .. id
    local meta = '{"status":"STARTED","task_id":' .. cjson.encode(id) .. tail
    local old = redis.call('SET', key, meta, 'NX', 'GET', 'EX', ARGV[3])
    local state = old and string.match(old, '"status": ?"(%u+)"')
    if state == 'SUCCESS' or state == 'FAILURE' or state == 'REVOKED' then
      redis.call('HDEL', KEYS[1], field)
      verdict = -2
    else
      if old then
        redis.call('SET', key, meta, 'EX', ARGV[3])
      end
      redis.call('HSET', KEYS[2], field, id)
      verdict = tonumber(redis.call('HGET', ARGV[2] .. id, 'attempts') or 0)
    end
  end
  reply[#reply + 1] = verdict
end
return reply
