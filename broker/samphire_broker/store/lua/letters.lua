-- letters: redrive and purge dead letters, as clients ask for.
-- With: ended, attempts, log
-- KEYS  1 sub:letters   2 dead   3 tried   4 ended   5 ended:before
-- ARGV  1 prefix of letters   2 prefix of result keys   3 prefix of task hashes   4 channel to wake lanes
--       5 most requests   6 longest event stream   7 lifetime of streams in s   8 lifetime of task hashes in s
--       9 prefix of claim checks, as messages name them
-- A request is "redrive:<run> <letter id>" or "purge:<run> <letter id>"; without ":<run>" it means the letter of any
-- run. A redriven message returns to its list as it was sent; the task's failure and its attempts are forgotten: its
-- next run begins, and so does one of every task that has ended because of it. What cannot be redriven keeps its
-- letter, which tells why: the task has been sent again and has not failed since, or its list is no list.
-- Returns the number of requests that were served: the bytes of one call are bounded, but for one letter's.
local requests_key, dead_key, tried_key, ended_key, ended_before_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local letter_prefix, meta_prefix, task_prefix, wake_channel = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local requests_max, stream_max, stream_ttl_s, task_ttl_s, blob_prefix = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
if call('TYPE', requests_key).ok ~= 'list' then
  return 0
end
local refusal = denied({
  {'DEL', letter_prefix .. 'id'}, {'DEL', meta_prefix .. 'id'}, {'HSET', letter_prefix .. 'id', 'field', ''},
  {'ZREM', dead_key, 'member'}, {'LPUSH', CELERY .. 'inference', ''}, {'LTRIM', requests_key, 0, -1}})
if refusal then
  return refusal
end
call('ZCARD', dead_key) -- fails before the first write if the key is of another type
local requests = call('LRANGE', requests_key, 0, requests_max - 1)
local READABLE_BYTES = 4 * 2 ^ 20 -- no lane reads a larger message, so it has no claim checks that were used
local bytes_left = CALL_BYTES
local function state_of(id)
  local value = recall(ended_key, ended_before_key, {id})[1]
  return state_in(try('GET', meta_prefix .. id)) or (value and STATES[string.sub(value, 1, 1)]), value
end
local function begin_run(id, stream, run)
  call('DEL', meta_prefix .. id)
  forget(ended_key, ended_before_key, id)
  open_run(task_prefix .. id, tried_key, id, run, '', task_ttl_s)
  log_redriven(id, run)
  tell(stream_for(id, stream), stream_max, stream_ttl_s, 'redriven', id, 'run', run)
end
local function refuse(key, why)
  call('HSET', key, 'refused', why)
  call('HINCRBY', key, 'refusals', 1)
end
local function redrive(key, letter)
  local found = call('HMGET', key, 'message', 'list', 'task_id', 'run', 'stream', 'ended')
  local message, list, id = found[1], found[2], found[3]
  if not (message and list and id) then
    return refuse(key, 'the letter is damaged: it has no message')
  end
  local state = id ~= '' and state_of(id)
  if state and state ~= 'FAILURE' then
    return refuse(key, 'task ' .. id .. ' was sent again after it had failed, and is ' .. state .. ' now')
  end
  local kind = call('TYPE', CELERY .. list).ok
  if kind ~= 'list' and kind ~= 'none' then
    return refuse(key, 'its queue ' .. list .. ' is a key of type ' .. kind)
  end
  if id ~= '' then
    begin_run(id, found[5] or '', tonumber(found[4] or 1) + 1)
    for _, other in ipairs(found[6] and cmsgpack.unpack(found[6]) or {}) do
      local its_state, value = state_of(other[1])
      if not its_state or its_state == 'FAILURE' then
        begin_run(other[1], other[2], (value and run_in(value) or other[3]) + 1)
      end
    end
  end
  call('LPUSH', CELERY .. list, message)
  call('DEL', key)
  call('ZREM', dead_key, letter)
  try('PUBLISH', wake_channel, list)
end
-- The task's own claim checks, which its message names: they were kept for a redrive. Not of one that runs again.
local function drop_blobs(key, size)
  if size > READABLE_BYTES then
    return
  end
  local found = call('HMGET', key, 'message', 'task_id')
  local message, id = found[1], found[2]
  local state = id and id ~= '' and state_of(id)
  if not message or not id or id == '' or (state and state ~= 'FAILURE') then
    return
  end
  local own, at = blob_prefix .. id .. ':', 1
  while true do
    local _, last = string.find(message, own, at, true)
    if not last then
      return
    end
    local number = match(message, '^%d+', last + 1)
    if number then
      try('UNLINK', NAMESPACE .. own .. number)
    end
    at = last + 1
  end
end
call('LTRIM', requests_key, 0, -1) -- a write that needs no memory lets the others through when memory is full
local served = 0
for _, request in ipairs(requests) do
  local verb, run, letter = match(request, '^(%l+):?(%d*) (.+)$')
  local key = letter_prefix .. (letter or '')
  if letter and call('TYPE', key).ok == 'hash' and (run == '' or run == (call('HGET', key, 'run') or '1')) then
    local size = call('HSTRLEN', key, 'message')
    bytes_left = bytes_left - (verb == 'purge' and size > READABLE_BYTES and 0 or size)
    if bytes_left < 0 and served > 0 then
      break
    end
    if verb == 'purge' then
      drop_blobs(key, size)
      call('UNLINK', key)
      call('ZREM', dead_key, letter)
    elseif verb == 'redrive' then
      redrive(key, letter)
    end
  end
  served = served + 1
end
call('LTRIM', requests_key, served, -1)
return served
