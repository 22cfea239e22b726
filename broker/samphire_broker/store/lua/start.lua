-- start: mark claimed tasks as running.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 cancelled   4 alone
-- ARGV  1 prefix of result keys   2 prefix of task hashes   3 host name   4 process id
--       5 worker id, "" to start although another worker is alone   6 MessagePack: array of [field, task id]
-- Returns for each task 0, or [attempts so far, those of them that took a worker or a model's process down, endpoints
-- that died with it, those of the crashes that took down what all workers share], or -1 (claim lost: not ours any
-- more), or -2 (the task already ended: a terminal state is written once; the message is dropped as a duplicate), or -3
-- (it is cancelled: it stays claimed and is to be settled as such), or -4 (another worker is alone with its model: it
-- stays claimed and is to be started later).
-- The running state has no lifetime of its own: settling, failing, releasing and reaping all replace it.
local tail = ',"result":{"hostname":' .. cjson.encode(ARGV[3]) .. ',"pid":' .. ARGV[4] .. '}'
tail = tail .. ',"traceback":null,"children":[],"date_done":null}'
local tasks = cmsgpack.unpack(ARGV[6])
local metas, hashes = {}, {}
for n = 1, #tasks do
  metas[n] = ARGV[1] .. tasks[n][2]
  hashes[n] = ARGV[2] .. tasks[n][2]
end
local old = redis.call('MGET', unpack(metas))
local some_cancelled = redis.call('TYPE', KEYS[3]).ok == 'zset'
local some_tried = redis.call('EXISTS', unpack(hashes)) > 0
local alone, alone_with
if ARGV[5] ~= '' then
  local holder = redis.pcall('GET', KEYS[4]) -- a key of another type is nobody's
  alone, alone_with = string.match(type(holder) == 'string' and holder or '', '^(%S+) (.*)$')
  alone = alone and alone ~= ARGV[5]
end
local reply, states, started, ended = {}, {}, {}, {}
for n = 1, #metas do
  local field, id = tasks[n][1], tasks[n][2]
  local state = old[n] and string.match(old[n], '"status": ?"(%u+)"')
  if redis.call('HEXISTS', KEYS[1], field) == 0 then
    reply[n] = -1
  elseif state == 'REVOKED' or (some_cancelled and redis.call('ZSCORE', KEYS[3], id)) then
    reply[n] = -3
  elseif state == 'SUCCESS' or state == 'FAILURE' then
    reply[n] = -2
    ended[#ended + 1] = field
  elseif alone and (alone_with == '' or string.match(field, '^%d+:inference%.([^@\6]*)') == alone_with)
    and redis.call('HEXISTS', KEYS[2], field) == 0 then -- what a call whose reply was lost has started may go on
    reply[n] = -4
  else
    local s = #states
    states[s + 1], states[s + 2] = metas[n], '{"status":"STARTED","task_id":' .. cjson.encode(id) .. tail
    started[s + 1], started[s + 2] = field, id
    local tried = some_tried and redis.call('HMGET', hashes[n], 'attempts', 'crashes', 'losses', 'shared')
    if tried and (tried[1] or tried[3]) then
      reply[n] = {}
      for i = 1, 4 do
        reply[n][i] = tonumber(tried[i] or 0)
      end
    else
      reply[n] = 0
    end
  end
end
-- HDEL first, even of nothing: as a write that needs no memory it lets the rest through when memory is full.
redis.call('HDEL', KEYS[1], '', unpack(ended))
redis.call('HDEL', KEYS[2], '', unpack(ended)) -- it may have been started before, by a call whose reply was lost
if #states > 0 then
  redis.call('MSET', unpack(states))
  redis.call('HSET', KEYS[2], unpack(started))
end
return reply
