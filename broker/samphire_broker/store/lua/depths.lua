-- depths: how many messages lie in lists, and when the one that is next in each was submitted.
-- KEYS  1.. lists
-- Returns how many lists were looked into, then for each of them its length, and the time in s since 1970, as text; ""
-- where the message does not say it, or nothing lies there. A message can only be read whole, so it ends once it has
-- read CALL_BYTES: the other lists are looked into by the next call.
local reply, read = {0}, 0
for n = 1, #KEYS do
  local length = try('LLEN', KEYS[n]) -- a key that is no list has nothing in it
  local sent = ''
  if type(length) ~= 'number' then
    length = 0
  elseif length > 0 then
    local message = call('LRANGE', KEYS[n], -1, -1)[1]
    read = read + #message
    sent = match(string.sub(message, -16384), '"samphire_sent_at": ?([0-9.]+)') or ''
  end
  reply[1], reply[2 * n], reply[2 * n + 1] = n, length, sent
  if read >= CALL_BYTES then
    break
  end
end
return reply
