-- common: stands before every other script of this folder, and has what all of them do; what only some do is in
-- `ended.lua` and `attempts.lua`, which stand before those that say "With:". These files touch only what they are
-- given. A script is not all or nothing: what has been written before a command fails stays. So no script writes before
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
  return match(field, '^%d+!?:inference%.([^@\6]*)')
end

-- Push a message to a list; beside it where a key of another type lies. Returns where it is, or nil: nowhere.
local function push(how, list, message)
  for _, key in ipairs({list, list .. ':returned'}) do
    if type(try(how, key, message)) == 'number' then
      return key
    end
  end
end

-- Celery's state in a stored result.
local function state_in(meta)
  return type(meta) == 'string' and match(meta, '"status": ?"(%u+)"') or nil
end

-- Append to a client's stream, and to no other key.
local function tell(stream, most, lifetime_s, ...)
  if match(stream, '^events:[%w-]+$') then
    try('XADD', stream, 'MAXLEN', '~', most, '*', ...)
    try('EXPIRE', stream, lifetime_s)
  end
end
