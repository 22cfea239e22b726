-- common: stands before every script, and has what all of them do; what only some do is in the files beside this one,
-- which stand before those that say "With:". These files touch only what they are given.
-- NAMESPACE begins every own key, CELERY every list of a queue and CHANNEL every channel: they stand before this file, as
-- the deployment has them; what is kept in keys and messages (lists, streams, claim checks) is named without them.
-- A script is not all or nothing: what has been written before a command fails stays. So no script writes before
-- everything that can fail has been tried: types are looked at by reading, rights with `denied`. What may fail without
-- harm (publishing, events, what is remembered of ended tasks, what an attempt leaves) goes through `try`. A claim is
-- the last thing to go, after what becomes of its message: should all of that be wrong, a message is there twice and
-- not lost.
local call, try, match = redis.call, redis.pcall, string.match

-- Whether this user may run a command, with arguments that stand for what will be run; and the error to return where
-- one of several may not be run. Redis before version 7 cannot be asked.
local may = redis.acl_check_cmd or function()
  return true
end
local function denied(commands)
  for _, command in ipairs(commands) do
    if not may(unpack(command)) then
      local what = command[1] .. ' on ' .. (command[2] or 'the server')
      return redis.error_reply('NOPERM the user of this connection may not run ' .. what)
    end
  end
end

-- As a write that needs no memory, the first one lets the others through when memory is full.
local function begin_to_write(hash)
  call('HDEL', hash, '')
end

-- Where a claim came from: its list, and its model.
local function list_of(field)
  return match(field, '^%d+!?:(.*)$')
end
local function model_of(field)
  local endpoint = match(field, '^%d+!?:(samphire%.webhooks%.[^\6]*)')
  return endpoint and '(' .. endpoint .. ')' or match(field, '^%d+!?:inference%.([^@\6]*)')
end

-- What a script reads and moves in one call, in bytes: the server does nothing else meanwhile.
local CALL_BYTES = 16 * 2 ^ 20

-- Push a message to a list; beside it where a key of another type lies. Returns the list's name, or nil: nowhere.
-- Its queue is named in `sub:queues`: lanes find it there, and the name may have been forgotten since the message was
-- taken out of it.
local named = {}
local function push(how, list, message)
  local queue = match(list, '^(inference%.[^\6]*)') or match(list, '^(samphire%.webhooks%.[^\6]*)')
  if queue and not named[queue] then
    named[queue] = true
    try('SADD', NAMESPACE .. 'sub:queues', queue)
  end
  for _, name in ipairs({list, list .. ':returned'}) do
    if type(try(how, CELERY .. name, message)) == 'number' then
      return name
    end
  end
end

-- Celery's state in a stored result.
local function state_in(meta)
  return type(meta) == 'string' and match(meta, '"status": ?"(%u+)"') or nil
end

-- The stream that is told of a task; none where its id could be taken for several, which events name with spaces
-- between.
local function stream_for(id, stream)
  return match(id, '[%s%c]') and '' or stream
end

-- Append to a client's stream, and to no other key.
local function tell(stream, most, lifetime_s, ...)
  if match(stream, '^events:[%w-]+$') then
    try('XADD', NAMESPACE .. stream, 'MAXLEN', '~', most, '*', ...)
    try('EXPIRE', NAMESPACE .. stream, lifetime_s)
  end
end
